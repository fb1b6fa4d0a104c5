"""How a CPU plays eight devices."""

FLAG = "--xla_force_host_platform_device_count=8"
