"""An exported model behind Ray Serve: docs/serving.md."""
