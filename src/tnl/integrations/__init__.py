"""The operators inside other libraries' models; a module each, imported on its own."""
