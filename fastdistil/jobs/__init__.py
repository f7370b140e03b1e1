"""Jobs on files: read texts, embed them in numbered parts, search the result."""
