"""Tokenized text and samples on disk, mapped into memory."""
