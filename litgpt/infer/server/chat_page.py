"""The chat page: static files, which need no API key, and request nothing but this server."""

from pathlib import Path

from litgpt.infer.server.page_files import list_page_files, send_files

FILES = list_page_files(Path(__file__).parent / "page")
"""The files by their paths."""
send_file = send_files(FILES)
