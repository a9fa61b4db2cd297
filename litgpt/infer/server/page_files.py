"""The files of a page: they need no API key, and the page requests nothing but its own server."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
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


def list_page_files(folder: Path) -> dict[str, Path]:
    """List the files of a page by their paths on the server: index.html at `/`, others below `/page`."""
    files = (path for path in sorted(folder.iterdir()) if path.suffix in MEDIA_TYPES)
    return {"/" if path.name == "index.html" else f"/page/{path.name}": path for path in files}


def send_files(files: Mapping[str, Path]) -> Callable[[Request], Awaitable[FileResponse]]:
    """A route that answers with the file at the path of a request."""

    async def send_file(request: Request) -> FileResponse:
        path = files[request.url.path]
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)

    return send_file
