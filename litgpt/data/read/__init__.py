"""Read documents and rows: text files, tables, JSON, archives and the hub."""
