"""What a step costs on the device and on the host."""
