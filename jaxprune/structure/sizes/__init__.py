"""One program for several input sizes."""
