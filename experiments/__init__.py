"""One experiment per file: flags, setup, and one visible loop."""
