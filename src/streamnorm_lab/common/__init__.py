"""What the whole laboratory uses: errors, files, settings, statistics."""
