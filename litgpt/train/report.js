// Draws the charts of a report.
charts.connect(document, document.getElementById("controls"), JSON.parse(document.getElementById("data").textContent));
