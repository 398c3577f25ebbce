"""Several devices and several hosts: where arrays live, how processes start and stop."""
