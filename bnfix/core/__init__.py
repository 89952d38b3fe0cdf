"""What every room uses: errors, settings, moments, guards, devices, processes."""
