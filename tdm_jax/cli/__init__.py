"""How every command starts, and the flags that several share."""
