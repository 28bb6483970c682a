"""What a host's processes say to each other: framed messages between a member and its agent, and locks."""
