"""What the command line does beyond calibration; may import both halves of the package."""
