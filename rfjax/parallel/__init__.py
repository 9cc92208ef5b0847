"""How arrays lie on several devices and machines."""
