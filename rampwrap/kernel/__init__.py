"""What a kernel is: its protocol, shape, CTA grid and device, the names of backends. Any room may import it."""
