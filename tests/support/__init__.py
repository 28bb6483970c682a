"""What several test folders share: polling with a deadline, real servers, faults."""
