"""What every command that writes a folder shares: files, locks, progress, interrupts, ranks."""
