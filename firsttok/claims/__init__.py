"""What the papers claim, the rule that decides on each claim, and where a paper is at odds."""
