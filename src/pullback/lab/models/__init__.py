"""Small networks that several studies share."""
