"""What people look at: statistics of an evaluation, terminal tables, the live view, report.html."""
