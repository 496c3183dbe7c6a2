"""Many runs in one program: members, their steps, and evolution."""
