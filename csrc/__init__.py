"""The native module's sources, and the programs that build it."""
