"""Where training data comes from: routes, simulated scans."""
