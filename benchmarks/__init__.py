"""What headprobe costs, measured."""
