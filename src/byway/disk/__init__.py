"""Files written whole or not at all; tensor files read and written one tensor at a time."""
