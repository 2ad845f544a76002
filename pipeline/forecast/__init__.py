"""What a job will take: what its input holds, how fast this machine has been, and the time that follows."""
