"""`litgpt board`: answer the requests of a page about the runs below a folder, until a signal."""

import secrets

from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.recipe.board import Board

try:
    from litgpt.board.app import BoardServer, BoardSettings, build_board
    from litgpt.board.run_processes import RunProcesses
    from litgpt.infer.server.listener import open_socket, run_app
except ImportError as error:
    raise UserError(f"board: {error.name} is not installed: pip install 'litgpt[serve]'") from None

GRACE_SECONDS = 5


def run(recipe: Board) -> None:
    """Serve the board, and print its address.

    Raises:
        UserError: if there is no such folder.
    """
    if not recipe.folder.is_dir():
        raise UserError(f"folder: {recipe.folder} is not a folder; give one with the output folders of runs")
    key = recipe.api_key or secrets.token_urlsafe(24)
    listener = open_socket(recipe.host, recipe.port)
    app = build_board(BoardServer(recipe.folder, BoardSettings(recipe.host, key), RunProcesses()))
    listener.listen()
    address, port = listener.getsockname()[:2]
    part = "" if recipe.api_key else f"#key={key}"  # a browser does not send it, and the page removes it
    print_message(f"Serving a board of {recipe.folder} at http://{address}:{port}/{part}")
    run_app(app, listener, grace_seconds=GRACE_SECONDS)
