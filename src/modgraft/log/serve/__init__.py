"""The log for editors (LSP), assistants (MCP) and browsers."""
