"""Servers of the log for editors (LSP), assistants (MCP) and browsers."""
