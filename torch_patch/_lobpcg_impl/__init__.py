"""What torch.lobpcg is made of: the solver, its derivatives, and the matrices that both act with."""
