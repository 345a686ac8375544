"""What ptxas makes of a kernel for an architecture that is not there: registers, spills, accesses, tensor cores, occupancy."""
