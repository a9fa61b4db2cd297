"""The chat page: static files, which need no API key, and request nothing but this server."""

from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse

PAGE_FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/" if path.name == "index.html" else f"/page/{path.name}": path
    for path in sorted(PAGE_FOLDER.iterdir())
    if path.suffix in MEDIA_TYPES
}
"""The files by their paths."""
SOURCES = ("script-src", "style-src", "img-src", "connect-src")
HEADERS = {
    "Content-Security-Policy": "; ".join(
        ["default-src 'none'", *(f"{source} 'self'" for source in SOURCES)]
        + [f"{directive} 'none'" for directive in ("base-uri", "form-action", "frame-ancestors")]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers ask whether the files have changed
}


async def send_file(request: Request) -> FileResponse:
    """The file at the path of a request."""
    path = FILES[request.url.path]
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)
