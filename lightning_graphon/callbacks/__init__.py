"""Lightning callbacks: thin hooks over the mathematics."""
