"""A policy behind a WebSocket: `server.py` for `dit4dit serve`, `client.py` (one file to copy to a robot) at its other end."""
