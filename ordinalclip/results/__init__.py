"""What happens after training: tables, significance, figures, model cards and reports, from run folders alone."""
