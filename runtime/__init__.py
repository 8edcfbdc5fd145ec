"""What any script needs around its work: settings and one-line errors, device, files, records, figures, seeds of generation."""
