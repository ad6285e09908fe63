"""The application: settings, names, run folders, sweeps, figures, reports, the command line."""
