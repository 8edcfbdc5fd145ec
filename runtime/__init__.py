"""The parts that any script needs around its work: command line, device, files, images, records, seeds, batches, processes."""
