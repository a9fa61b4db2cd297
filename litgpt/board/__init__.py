"""The board: a page with the runs below a folder."""
