"""The hub: names pinned to commits, downloads taken up again, ported models published."""
