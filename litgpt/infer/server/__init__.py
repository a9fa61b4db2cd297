"""An HTTP server with the routes of OpenAI's API."""
