"""What makes training on a frozen base cheap; each lever beside its plain twin."""
