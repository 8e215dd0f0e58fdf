"""The host side of Estiba: job files, plans, prices and the machines that run them. Never imports torch or `estiba`."""
