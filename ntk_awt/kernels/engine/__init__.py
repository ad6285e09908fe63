"""How a kernel is computed: the traced program, the forms of one weight, the plan."""
