"""Second moments of the keys that each layer sees on ordinary text: made, stored, found and looked at."""
