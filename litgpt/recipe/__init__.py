"""The settings of all commands, as dataclasses that validate themselves."""
