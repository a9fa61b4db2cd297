"""Render conversations as token ids and labels: chat templates, prompt styles, tools, loss weights."""
