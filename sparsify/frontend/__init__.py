"""From what a user names (a folder, a hub id, a module) to a captured program, and back to a module."""
