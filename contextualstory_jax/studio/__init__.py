"""The studio: a page and HTTP endpoints to write stories, change their frames and keep them."""
