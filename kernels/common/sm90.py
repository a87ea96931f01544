"""What one SM of a Hopper GPU has. Each resident CTA costs 1 KB of its shared memory."""

MAX_SHARED = 227 * 1024
"Bytes of shared memory that one CTA may have."
SM_SHARED = 228 * 1024
SM_REGISTERS = 65_536
SM_THREADS = 2048
MAX_GRID_Y = 65_535
"CTAs along the second axis of a grid."
